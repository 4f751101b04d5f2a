"""`plan`: what a step of LoRA takes of each device, said without weights."""
