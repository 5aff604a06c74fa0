"""Model families. Everything that knows a module name, a tokenizer or a pipeline lives here."""
