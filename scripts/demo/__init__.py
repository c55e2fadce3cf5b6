"""Programs that render the demo data and train the demo models."""
