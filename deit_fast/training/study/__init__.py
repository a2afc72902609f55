"""The study: the report's three models trained under several seeds, ablations, and the page that compares them."""
