"""What a reduction tells: tables, doubts and their rendering."""
