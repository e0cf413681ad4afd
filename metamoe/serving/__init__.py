"""A unified model behind the HTTP API that others have made common."""
