"""Parameters of many subjects, and what covariates do to them."""
