"""What every interface does with a cluster."""
