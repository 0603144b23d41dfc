/** The browser's client of wsbroadcast; see docs/browser-client.md. */

/** A message that was broadcast. */
export interface Message<Data = unknown> {
  type: "message"
  /** The channel it was broadcast to; missing if it was for a user, for everyone or for this connection alone. */
  channel?: string
  to?: "user" | "everyone" | "connection"
  /** What was broadcast; bytes are a `Uint8Array`. On a plain connection: the text, or a `Blob`. */
  data: Data
  /** Its place in the history of its channel; missing if nothing is kept. */
  position?: string
  /** The same for all messages of one broadcast to several channels. */
  id?: string
}

/** Messages of a channel follow from here on. */
export interface Subscribed {
  type: "subscribed"
  channel?: string
  to?: "user" | "everyone"
  position?: string
  /** Whether everything that was missed came; missing if nothing was asked for. */
  recovered?: boolean
  reason?: string
}

/** Messages were missed that can't be had any more. */
export interface Gap {
  type: "gap"
  channel?: string
  to?: "user" | "everyone"
  reason: string
  position?: string
}

/** A member of a channel. */
export interface Member<Info = any> {
  /** The user; `null` for a connection without a user, which is a member only if each connection counts. */
  user: string | null
  /** The connection's id, if each connection counts. */
  id?: string
  /** What others may see of it. */
  info: Info
}

/** Who is in a channel: the list, what has changed since `previous`, or only how many, if they are too many. */
export interface Presence<Info = any> {
  type: "presence"
  channel: string
  version: number
  previous?: number
  /** How many are there, also connections without a user, which are not in the list. */
  count: number
  members?: Member<Info>[]
  joined?: Member<Info>[]
  /** Users; or ids of connections, if each connection counts. */
  left?: string[]
}

/** Who is in a channel now, by user, or by id if each connection counts. Empty if they are too many. */
export interface Members<Info = any> extends ReadonlyMap<string, Member<Info>> {
  /** How many are there; `undefined` until it is known. */
  readonly count?: number
}

/** The answer to a publish. */
export interface Published {
  /** `handled` if a handler of the server has taken it: then it wasn't broadcast. */
  type: "published" | "handled"
  channel?: string
  to?: "everyone"
  position?: string
  /** Whether it was published before under the same key. Then nobody gets it again. */
  is_repeat?: boolean
}

/**
 * `connecting` at first; then `open`; `lost` if it was cut off and isn't back after three seconds; `closed` for good.
 */
export type Status = "connecting" | "open" | "lost" | "closed"

/** Why it is closed for good. */
export interface Closed {
  code: number
  reason: string
}

/** Why a command was not done. */
export interface CommandError extends Error {
  /**
   * `lost`: there is no connection, or it was lost before the answer came. In that case the command may have been done.
   * Other codes come from the server: see docs/protocol.md.
   */
  code: string
  /** Which arguments of a call don't fit, and why. */
  errors?: { loc: (string | number)[]; type: string; msg: string }[]
}

export interface Options {
  /** Returns a token. Called before each attempt, and when a token expires. `null` ends the connection with 4401. */
  token?: () => string | null | undefined | Promise<string | null | undefined>
  /**
   * Loads what the page shows: before the first connection, and when messages were missed that can't be had any more.
   * Returns the position that the server read before it read the data, so that nothing is missed in between.
   */
  state?: (channel?: string) => string | void | Promise<string | void>
  /** Whether the server sends plain messages, without events. Then nothing is recovered. */
  plain?: boolean
  /** The name before the token in the list of subprotocols; `bearer` by default. */
  tokenProtocol?: string
}

export interface Events<Receives = unknown> {
  message: (message: Message<Receives>) => void
  status: (status: Status, closed?: Closed) => void
  subscribed: (event: Subscribed) => void
  gap: (event: Gap) => void
  /** Who is in a channel has changed. `members` has the change already. */
  presence: (event: Presence) => void
  /** `token` or `state` has failed, a handler has thrown, or the server says that something wasn't done. */
  error: (error: unknown) => void
}

/** The arguments of a method. They may be left out if none is required. */
export type Arguments<Method> = Method extends { args: infer Args }
  ? {} extends Args
    ? [args?: Args]
    : [args: Args]
  : never

/** The result of a method. */
export type Result<Method> = Method extends { result: infer Value } ? Value : never

export interface Connection<Receives = unknown, Sends = unknown, Methods extends object = {}> {
  readonly status: Status
  /** Calls a handler for each event of a type; returns a function that removes the handler. */
  on<Type extends keyof Events>(type: Type, handler: Events<Receives>[Type]): () => void
  /** Publishes to a channel, by default that of the path. With a key it is published only once, even if repeated. */
  publish(data: Sends, options?: { channel?: string; key?: string }): Promise<Published>
  /** Calls a method of the server. If the methods have types, it must be one of them. */
  call<Name extends keyof Methods & string>(
    name: Name,
    ...args: Arguments<Methods[Name]>
  ): Promise<Result<Methods[Name]>>
  call<Value = unknown>(
    name: [keyof Methods] extends [never] ? string : never,
    args?: Record<string, unknown>,
  ): Promise<Value>
  /**
   * Gets the messages of another channel as well, also after reconnecting. Settles when the server has answered. Begins
   * after `since`, the position of what the page has loaded.
   */
  subscribe(channel: string, options?: { since?: string }): Promise<Subscribed>
  unsubscribe(channel: string): Promise<unknown>
  /**
   * Returns who is in a channel that this client is in, by default that of the path. It is the same object each time,
   * empty at first, and kept up to date, also after reconnecting. The event `presence` tells when it changes.
   */
  members<Info = any>(channel?: string): Members<Info>
  /** Ends it for good. */
  close(): void
}

/**
 * Connects, and reconnects until it is closed for good.
 *
 * What a page receives, sends and calls may have types: `wsbroadcast types` writes those of an app.
 *
 * @param url The URL of the WebSocket, relative to the page: `"/ws/room:1"`
 */
export function connect<Receives = any, Sends = any, Methods extends object = {}>(
  url: string | URL,
  options?: Options,
): Connection<Receives, Sends, Methods>
