"""The shipped model, its preference data, and the scenes that it draws."""
