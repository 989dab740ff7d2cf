"""The dialects that come with core. Each is registered like any plugin's, through `DialectSpec`."""
