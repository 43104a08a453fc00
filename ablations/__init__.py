"""Questions asked of the recipes: to come."""
