"""What a model was seen to do: statistics of its layers' inputs, and ranks that follow."""
