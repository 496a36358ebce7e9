"""The parties as processes: transport, certificates, dealer service, servers and owners' sessions."""
