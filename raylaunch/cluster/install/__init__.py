"""The environment of a raylaunch version on a host, and the wheels that it is made of."""
