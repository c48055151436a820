"""Plain torch modules from Pyro programs: recorded, made free of the batch size, assembled."""
