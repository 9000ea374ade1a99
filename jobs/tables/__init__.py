"""What devices can do and what they cost: data that users may replace."""
