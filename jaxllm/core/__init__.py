"""The vocabulary of compression: it knows no paper and no architecture."""
