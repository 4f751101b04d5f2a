"""`finetune`: a LoRA of a language model, from a configuration and a file of texts."""
