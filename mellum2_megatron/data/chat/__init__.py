"""Chat data: conversations to packs with loss masks, for supervised fine-tuning."""
