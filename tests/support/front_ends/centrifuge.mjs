// What a test tells clients of the Centrifuge SDK to do, in Node and in a page: one client for each tab, a log of what it
// is told, and every frame of its sockets.

const decoder = new TextDecoder()
const plain = (data) => (data instanceof Uint8Array ? JSON.parse(decoder.decode(data) || "null") : data) ?? null
const encoded = (it, data) => (it.isProtobuf ? new TextEncoder().encode(JSON.stringify(data)) : data)
const info = (from) => from && {
  client: from.client, user: from.user, conn_info: plain(from.connInfo), chan_info: plain(from.chanInfo),
}
const publication = ({ data, offset, info: from }) => ({ data: plain(data), offset: offset ?? 0, info: info(from) ?? null })
const told = {
  connecting: ({ code, reason }) => ({ code, reason }),
  connected: ({ client, data }) => ({ client, data: plain(data) }),
  disconnected: ({ code, reason }) => ({ code, reason }),
  error: ({ error, type }) => ({ code: error.code ?? 0, message: error.message, type }),
  message: ({ data }) => ({ data: plain(data) }),
  subscribing: ({ code, reason }) => ({ code, reason }),
  subscribed: (ctx) => ({
    position: ctx.streamPosition ?? null, was_recovering: ctx.wasRecovering, recovered: ctx.recovered, data: plain(ctx.data),
  }),
  unsubscribed: ({ code, reason }) => ({ code, reason }),
  publication,
  join: ({ info: who }) => ({ info: info(who) }),
  leave: ({ info: who }) => ({ info: info(who) }),
}

// A WebSocket class that keeps what goes through it, each with the number of its socket.
const size = (data) => (typeof data === "string" ? data : { bytes: data.byteLength ?? data.length })
const recording = (WebSocket, it) => class extends WebSocket {
  constructor(...args) {
    super(...args)
    it.socket = this
    this.number = it.sockets++
    this.addEventListener("message", ({ data }) => it.frames.push([this.number, "<", size(data)]))
    this.addEventListener("close", ({ code, reason }) => it.frames.push([this.number, "x", [code, String(reason)]]))
  }
  send(data) {
    it.frames.push([this.number, ">", size(data)])
    if (!it.isMuted) super.send(data)
  }
}

const rejected = (error) => ({ error: { code: error.code, message: error.message } })
const history = ({ publications, offset, epoch }) => ({ publications: publications.map(publication), offset, epoch })

export const actions = ({ Json, Protobuf, WebSocket }) => {
  const tabs = {}
  const crowd = []
  // Tokens in turn, the last for ever; of `null` the app says that there is none.
  const tokens = (it, name, list) => list && (async () => {
    it.log.push({ on: name })
    const token = list.length > 1 ? list.shift() : list[0]
    if (token === null) throw new it.client.constructor.UnauthorizedError("no")
    return token
  })
  const listen = (it, emitter, events, channel) => {
    for (const event of events) {
      emitter.on(event, (ctx) => it.log.push({ on: event, channel: channel ?? ctx.channel ?? null, ...told[event](ctx) }))
    }
  }
  const sub = (tab, channel) => tabs[tab].client.getSubscription(channel)
  const of = (tab, channel) => (channel && sub(tab, channel)) || null

  const all = {
    open(tab, { url, protobuf, tokens: list, connect = true, data, ...options }) {
      const it = tabs[tab] = { log: [], frames: [], isProtobuf: Boolean(protobuf), isMuted: false, socket: null, sockets: 0, states: 0 }
      const Client = protobuf ? Protobuf : Json
      it.client = new Client(url, {
        websocket: recording(WebSocket, it), getToken: tokens(it, "get_token", list) ?? null,
        minReconnectDelay: 50, maxReconnectDelay: 500, data: data === undefined ? null : encoded(it, data), ...options,
      })
      listen(it, it.client, Object.keys(told))
      if (connect) it.client.connect()
    },
    connect: (tab) => { tabs[tab].client.connect() },
    disconnect: (tab) => { tabs[tab].client.disconnect() },
    subscribe(tab, { channel, tokens: list, state, data, subscribes = true, ...options }) {
      const it = tabs[tab]
      const known = it.client.getSubscription(channel)
      if (known) { known.subscribe(); return }
      const made = it.client.newSubscription(channel, {
        getToken: tokens(it, "get_subscription_token", list) ?? null, minResubscribeDelay: 50, maxResubscribeDelay: 500,
        data: data === undefined ? null : encoded(it, data),
        ...(state && { getState: async () => { it.log.push({ on: "get_state", channel }); return state[Math.min(it.states++, state.length - 1)] } }),
        ...options,
      })
      listen(it, made, ["subscribing", "subscribed", "unsubscribed", "publication", "join", "leave", "error"], channel)
      if (subscribes) made.subscribe()
    },
    unsubscribe: (tab, { channel }) => { sub(tab, channel).unsubscribe() },
    remove: (tab, { channel }) => { sub(tab, channel).unsubscribe(); tabs[tab].client.removeSubscription(sub(tab, channel)) },
    publish: (tab, { channel, data }) => tabs[tab].client.publish(channel, encoded(tabs[tab], data)).then(() => ({}), rejected),
    rpc: (tab, { method, data }) => tabs[tab].client.rpc(method, encoded(tabs[tab], data)).then((found) => ({ data: plain(found.data) }), rejected),
    send: (tab, { data }) => tabs[tab].client.send(encoded(tabs[tab], data)).then(() => ({}), rejected),
    history: (tab, { channel, ...options }) => tabs[tab].client.history(channel, options).then(history, rejected),
    presence: (tab, { channel }) => tabs[tab].client.presence(channel).then(({ clients }) => ({
      clients: Object.fromEntries(Object.entries(clients).map(([key, who]) => [key, info(who)])),
    }), rejected),
    presence_stats: (tab, { channel }) => tabs[tab].client.presenceStats(channel).then(
      ({ numClients, numUsers }) => ({ num_clients: numClients, num_users: numUsers }), rejected,
    ),
    // Lose the connection without a word of the server's, or stop saying anything.
    cut: (tab) => { const { socket } = tabs[tab]; socket.terminate ? socket.terminate() : socket.close() },
    mute: (tab, { muted }) => { tabs[tab].isMuted = muted },
    say: (tab, { frame }) => { tabs[tab].socket.send(frame) },
    look(tab) {
      const { client, log, frames } = tabs[tab]
      const subscriptions = Object.fromEntries(
        Object.entries(client.subscriptions()).map(([channel, { state }]) => [channel, state]),
      )
      return { state: client.state, log, frames, subscriptions }
    },

    // Many clients at once, which count what they get and keep nothing else.
    crowd(_, { urls, number, channel, protobuf, token }) {
      for (let index = 0; index < number; index++) {
        const it = { got: 0, first: null, last: null, twice: 0, missing: 0, unrecovered: 0, connects: 0, codes: {} }
        const Client = protobuf ? Protobuf : Json
        it.client = new Client(urls[index % urls.length], { websocket: WebSocket, token, minReconnectDelay: 100, maxReconnectDelay: 5000 })
        it.client.on("connected", () => { it.connects++ })
        for (const event of ["connecting", "disconnected"]) {
          it.client.on(event, ({ code }) => { it.codes[code] = (it.codes[code] ?? 0) + 1 })
        }
        const made = it.client.newSubscription(channel)
        made.on("subscribed", ({ wasRecovering, recovered }) => { it.unrecovered += wasRecovering && !recovered })
        made.on("publication", ({ data }) => {
          const number = plain(data)
          if (it.last === null) it.first = number
          else if (number <= it.last) it.twice++
          else it.missing += number - it.last - 1
          it.last = Math.max(number, it.last ?? number)
          it.got++
        })
        made.subscribe()
        it.client.connect()
        crowd.push({ it, made })
      }
    },
    crowd_look() {
      const sum = (name) => crowd.reduce((total, { it }) => total + it[name], 0)
      const codes = {}
      for (const { it } of crowd) for (const [code, count] of Object.entries(it.codes)) codes[code] = (codes[code] ?? 0) + count
      return {
        subscribed: crowd.filter(({ made, it }) => made.state === "subscribed" && it.client.state === "connected").length,
        lasts: [...new Set(crowd.map(({ it }) => it.last))], firsts: [...new Set(crowd.map(({ it }) => it.first))],
        got: sum("got"), twice: sum("twice"), missing: sum("missing"), unrecovered: sum("unrecovered"), connects: sum("connects"),
        codes,
      }
    },
  }
  return all
}
