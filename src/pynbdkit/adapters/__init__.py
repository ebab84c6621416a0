"""Plugin contracts of others, made Plugins of ours."""
