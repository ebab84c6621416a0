"""The plugins: one file each; the file's name is the plugin's (a leading "_" makes it a helper)."""
