"""Looking at what others made: which weights two models differ in, and whether an edit's folder is what it says."""
