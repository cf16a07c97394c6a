"""From text to a trained router, and what each way to use the experts costs."""
