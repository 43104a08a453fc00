"""Release folders: written from a checkpoint, and checked whoever made them."""
