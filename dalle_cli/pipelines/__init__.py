"""What a user imports and what commands call: artifacts and arrays in, arrays out."""
