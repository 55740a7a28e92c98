"""What `services.protocol.images` decodes with, by format."""
