"""What amint_ray runs on."""
