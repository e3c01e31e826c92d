"""Where the tunnel's program was in 0.1.0; its name is a contract."""
