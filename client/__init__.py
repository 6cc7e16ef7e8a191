"""What runs on the user's device: data, adapters, training, and the only door out."""
