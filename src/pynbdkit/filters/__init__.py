"""The filters: one file each; the file's name is the filter's (a leading "_" makes it a helper)."""
