"""Problems of hosts, with their fixes."""
