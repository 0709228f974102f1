"""What T-LoRA does in the code of others: loaders, trainers, files that hosts write."""
