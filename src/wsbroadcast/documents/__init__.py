"""Documents of an app's WebSockets, made of its types: AsyncAPI and TypeScript. Nothing here knows connections."""
