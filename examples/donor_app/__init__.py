"""A page that shows a recipient and a transplant side by side."""
