/** The browser's client of wsbroadcast; see docs/browser-client.md. */

/** Something that was broadcast. */
export interface Message<Data = unknown> {
  type: "message"
  /** The channel that it was broadcast to; missing if that was a user, everyone or this connection alone. */
  channel?: string
  to?: "user" | "everyone" | "connection"
  /** What was broadcast; a `Uint8Array` if that was bytes. Of a plain connection: the text, or a `Blob`. */
  data: Data
  /** Its place in the history of its channel; missing where nothing is kept. */
  position?: string
  /** What the messages of one broadcast to several channels have in common. */
  id?: string
}

/** From here on the messages of a channel follow. */
export interface Subscribed {
  type: "subscribed"
  channel?: string
  to?: "user" | "everyone"
  position?: string
  /** Whether everything came that was missed; missing if nothing was asked for. */
  recovered?: boolean
  reason?: string
}

/** Something was missed that can't be had any more. */
export interface Gap {
  type: "gap"
  channel?: string
  to?: "user" | "everyone"
  reason: string
  position?: string
}

/** What a publish was answered with. */
export interface Published {
  type: "published"
  channel?: string
  to?: "everyone"
  position?: string
  /** Whether it was published before under the same key, so that nobody gets it again. */
  is_repeat?: boolean
}

/**
 * `connecting` at first; `open`; `lost` three seconds after it was cut off, unless it is back by then; `closed` for good.
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
   * `lost`: there is no connection, or it was lost before the answer came, and the command may have been done. Others
   * are the server's: see the codes in docs/protocol.md.
   */
  code: string
  /** Which arguments of a call don't fit, and why. */
  errors?: { loc: (string | number)[]; type: string; msg: string }[]
}

export interface Options {
  /** Makes a token, before each attempt and when one expires; `null` ends the connection with 4401. */
  token?: () => string | null | undefined | Promise<string | null | undefined>
  /**
   * Loads what the page shows: before the first connection, and when something was missed that can't be had any more.
   * Returns the position that the server had before it read that, so that nothing falls in between.
   */
  state?: (channel?: string) => string | void | Promise<string | void>
  /** Whether the server speaks no events: messages are what was sent, and nothing is recovered. */
  plain?: boolean
  /** The name in front of the token among the subprotocols; `bearer` by default. */
  tokenProtocol?: string
}

export interface Events<Data = unknown> {
  message: (message: Message<Data>) => void
  status: (status: Status, closed?: Closed) => void
  subscribed: (event: Subscribed) => void
  gap: (event: Gap) => void
  /** `token` or `state` failed, a handler has thrown, or the server says that something wasn't done. */
  error: (error: unknown) => void
}

export interface Connection<Data = unknown> {
  readonly status: Status
  /** Calls a handler for each event of a kind; returns what takes it away again. */
  on<Type extends keyof Events>(type: Type, handler: Events<Data>[Type]): () => void
  /** Publishes to a channel, by default that of the path; with a key once, however often it is repeated. */
  publish(data: unknown, options?: { channel?: string; key?: string }): Promise<Published>
  /** Calls a method of the server. */
  call<Result = unknown>(name: string, args?: Record<string, unknown>): Promise<Result>
  /**
   * Gets the messages of another channel, too, over all connections; settles when the server has answered. Begins where
   * `since` says, which is the position of what the page has loaded.
   */
  subscribe(channel: string, options?: { since?: string }): Promise<Subscribed>
  unsubscribe(channel: string): Promise<unknown>
  /** Ends it for good. */
  close(): void
}

/**
 * Connects, and comes back until it is closed for good.
 *
 * @param url of the WebSocket, relative to the page: `"/ws/room:1"`
 */
export function connect<Data = any>(url: string | URL, options?: Options): Connection<Data>
