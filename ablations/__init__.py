"""Questions asked of the recipes: a file for each study, and the code that runs and reads them."""
