"""What every script needs: recipes, files that are whole or absent, errors in one line, the machine."""
