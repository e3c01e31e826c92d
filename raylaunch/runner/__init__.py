"""The process inside the Ray job. Standard library only: it runs under any Python from 3.8 on."""
