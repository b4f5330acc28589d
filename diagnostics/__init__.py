"""What can be checked about a device or a computation; knows nothing of the cluster it runs on."""
