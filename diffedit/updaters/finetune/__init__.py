"""Fine-tuning baselines: the methods that the closed form is measured against, as real training loops."""
