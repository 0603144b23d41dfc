// The browser's client of wsbroadcast: a connection that comes back by itself and knows what it has missed.
// It speaks the protocol `events` over a WebSocket. Where a proxy lets none through it takes server-sent events, and
// where that holds those back, too, long polls. What it does is in docs/browser-client.md, types in wsbroadcast.d.ts.

const COMES_BACK = [1001, 1006, 1011, 1012, 1013]
const STEADY = 5000 // a connection that has lasted so long (ms) was a good one: the waits begin anew
const GRACE = 3000 // from the loss of a connection until the page is told
const OPEN_TIMEOUT = 10_000, PROBE_TIMEOUT = 3000 // for a WebSocket to open, for the answer to a ping
const FIRST_BYTE_TIMEOUT = 5000 // the server says hello at once: later means that somebody holds it back
const SLACK = 10_000, WAIT = 20 // how much later than its interval a ping may come (ms); of a long poll (s)
const WAKES = ["visibilitychange", "resume", "online", "pageshow", "pagehide"] // those of the document pass by, too
const SINCE = [["", "since"], [">user", "since_user"], [">everyone", "since_everyone"]] // positions in the URL
const failure = (code, text, more) => Object.assign(new Error(text), more, { code })
const split = (position = "") => position.split(":") // into epoch and offset
const lost = () => failure("lost", "no connection; what waited for its answer may have been done")

export function connect(url, { token, state, plain, tokenProtocol = "bearer" } = {}) {
  const address = new URL(url, location.href), handlers = {}
  const pending = new Map() // commands that wait for their answer, by id
  const positions = new Map() // where this client is, by channel; "" is the channel of the path
  const wanted = new Map() // how to subscribe again, by channel
  const client = `${Math.random()}${Math.random()}`.padEnd(16, "0") // names the keys of its publishes, over all connections
  const waits = { min: 0.5, max: 20, ping: 0 } // between attempts and pings (s); the server may say otherwise
  let status = "connecting", isOver, isHidden // for good; by `pagehide`
  let link, openedAt // what is open now; since when, or 0
  let end, wake = () => {} // ends this attempt: end(code, reason, wait); ends the wait for the next one
  let pathChannel, count = 0, watch, grace // from the first `subscribed`; of commands; timers: all is silent, tell the page
  let isHeldBack, patience = STEADY // SSE, by a proxy; how long HTTP does until a WebSocket is tried again
  let taken = Promise.resolve() // messages are taken one after the other, and wait while `state` loads
  const tell = (type, ...what) => handlers[type]?.forEach((handler) => handler(...what))
  const sleep = (ms) => new Promise((done) => setTimeout((wake = done), ms))
  const keyOf = ({ channel, to }) => (to ? `>${to}` : channel === pathChannel ? "" : channel ?? "")

  function become(next, detail) {
    grace = clearTimeout(grace)
    if (next !== status) tell("status", (status = next), detail)
  }
  function opened(next) {
    link = next
    openedAt = Date.now()
    become("open")
    if (link.probe) wanted.forEach(({ again }) => again())
  }
  function lose() { // what was asked for is not answered any more; the page is told, unless it is back soon
    link = end = clearTimeout(watch)
    pending.forEach(({ reject }) => reject(lost()))
    pending.clear()
    if (!isOver) grace ??= setTimeout(become, GRACE, "lost")
  }
  function close(code = 1000, reason = "") {
    if (isOver) return
    isOver = true
    end?.(code)
    lose()
    for (const type of WAKES) removeEventListener(type, awake, true)
    become("closed", { code, reason })
    wake()
  }
  function alive(ms = waits.ping && waits.ping * 1000 + SLACK) { // something came: the next may take a ping and some slack
    clearTimeout(watch)
    if (ms) watch = setTimeout(() => end?.(1006), ms)
  }
  function receive(event) { // answers are given at once, the rest in turn
    const { type } = event, waiting = pending.get(event.id)
    pending.delete(event.id)
    if (waiting && type === "error") return waiting.reject(failure(event.code, event.text, event))
    waiting?.resolve(type === "result" ? event.data : event)
    if (waiting && type !== "subscribed") return
    if (type === "hello") Object.assign(waits, event.reconnect, { ping: event.ping })
    if (type === "expiring" && token) refresh().catch(() => {}) // then it ends with 4401
    taken = taken.then(() => take(event)).catch((error) => tell("error", error))
  }
  const refresh = async () => ask({ type: "refresh", token: await token() })
  async function take(event) {
    const { type, channel, position, recovered } = event
    if (type === "subscribed" && event.id === undefined) pathChannel ??= channel
    const key = keyOf(event), before = positions.get(key)
    const [epoch, offset] = split(position), [epochBefore, offsetBefore] = split(before)
    if (type === "message" && epoch && epoch === epochBefore && +offset <= +offsetBefore) return // a repeat
    const isMissed = recovered === false || type === "gap"
    const loaded = isMissed ? await load(channel) : ""
    if (loaded === undefined) return end?.(1006) // the next connection asks from the same place
    if (loaded || (position && (type !== "subscribed" || isMissed || !before))) positions.set(key, loaded || position)
    if (event.encoding) event.data = Uint8Array.from(atob(event.data), (byte) => byte.charCodeAt(0))
    if (type === "subscribed") wanted.get(channel)?.resolve(event)
    if (type === "error") wanted.get(event.id)?.refuse(failure(event.code, event.text)) // over HTTP, by the channel's name
    tell(type, event)
  }
  async function load(channel) { // the page loads what it shows; returns where that was, if that could be done
    try {
      const position = await state?.(channel)
      return typeof position === "string" ? position : ""
    } catch (error) {
      tell("error", error)
    }
  }
  const ask = (command) => new Promise((resolve, reject) => {
    if (!link) return reject(lost())
    if (plain) return reject(failure("not_supported", "the connection is plain"))
    link.send({ ...command, id: ++count })
    pending.set(count, { resolve, reject })
  })
  function target(query = {}) {
    const found = new URL(address)
    for (const [key, name] of SINCE) if (positions.has(key)) query[name] = positions.get(key)
    for (const name in query) found.searchParams.set(name, query[name])
    const at = (name) => (positions.has(name) ? `${name}@${positions.get(name)}` : name)
    if (query.events) wanted.forEach((_, name) => found.searchParams.append("channel", at(name)))
    return found
  }
  // One connection each. They resolve with [code, reason, wait] when it has ended.
  const newSocket = (secret, place = target()) => {
    place.protocol = place.protocol.replace("http", "ws")
    return new WebSocket(place, [...(plain ? [] : ["wsbroadcast.v1"]), ...(secret ? [tokenProtocol, secret] : [])])
  }
  const overWebSocket = (secret) => new Promise((done) => {
    const socket = newSocket(secret)
    const send = (command) => socket.send(plain ? command : JSON.stringify(command))
    end = (code, reason) => {
      socket.onopen = socket.onmessage = socket.onclose = null
      socket.close() // of a dead link nobody hears for long, so nothing waits for it
      done([code, reason])
    }
    socket.onclose = ({ code, reason }) => end(code, reason)
    socket.onopen = () => {
      isHeldBack = false
      patience = STEADY
      alive((waits.ping = 0)) // until `hello` says when pings come
      opened({ send, probe: () => plain || alive(PROBE_TIMEOUT, send({ type: "ping" })) })
    }
    socket.onmessage = ({ data }) => {
      alive()
      receive(plain ? { type: "message", data } : JSON.parse(data))
    }
    alive(OPEN_TIMEOUT)
  })
  const overHttp = (secret) => new Promise((done) => {
    let over = new AbortController()
    const finish = (end = (...outcome) => done(outcome, over.abort(), clearTimeout(retry)))
    const request = async (accept, query, body) => {
      const headers = { accept, ...(secret && { authorization: `Bearer ${secret}` }), ...(body && { "content-type": accept }) }
      const options = { method: body ? "POST" : "GET", body, headers, cache: "no-store", signal: over.signal }
      const response = await fetch(body ? address : target(query), options)
      if (response.ok || body) return response
      const { code, reason } = await response.json().catch(() => ({})) // as a close frame says it
      throw finish(code ?? { 401: 4401, 403: 4403 }[response.status] ?? 1006, reason)
    }
    const send = ({ id, ...command }) => request("application/json", {}, JSON.stringify(command))
      .then(async (response) => receive({ ...(await response.json()), id }))
      .catch(() => pending.get(id)?.reject(lost()))
    async function stream() {
      const timer = setTimeout(() => over.signal.aborted || over.abort((isHeldBack = true)), FIRST_BYTE_TIMEOUT)
      const response = await request("text/event-stream", { events: 1 })
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
      for (let text = "", wait; ; alive()) {
        const { value, done } = await reader.read()
        clearTimeout(timer)
        if (done) return finish(1006, "", wait)
        const lines = (text + value).split("\n")
        text = lines.pop()
        for (const line of lines) {
          if (line.startsWith("retry:")) wait = +line.slice(6)
          const event = line.startsWith("data:") && JSON.parse(line.slice(5))
          if (event.type === "close") return finish(event.code, event.reason, wait)
          if (event.type === "hello") opened({ send })
          if (event) receive(event)
        }
      }
    }
    async function poll() {
      over = new AbortController()
      for (let wait = 0; ; wait = WAIT) {
        alive(wait * 1000 + SLACK)
        const response = await request("application/json", { wait, events: 1 })
        const { position, recovered, messages } = await response.json()
        if (!link) opened({ send })
        if (recovered === false) receive({ type: "subscribed", position, recovered })
        messages.forEach(receive)
        receive({ type: "position", position })
        await taken // the next asks from there
      }
    }
    let retry
    const knock = () => (retry = setTimeout(() => { // in a while: a server that restarted may let WebSockets through again
      const probe = newSocket(secret, new URL(address))
      probe.onopen = () => probe.close() || pending.size || finish(1006, "", 0)
      knock((patience = Math.min(patience * 2, 600_000)))
    }, patience))
    knock()
    ;(isHeldBack ? poll() : stream().catch((error) => (isHeldBack ? poll() : Promise.reject(error)))).catch(() => finish(1006))
  })
  async function run() {
    let attempts = 0, refusals = 0, unopened = 0 // WebSockets in a row
    while (!isOver) {
      const isHttp = unopened > 1
      let outcome = [1006], tried = 0
      openedAt = 0
      try {
        while (isHidden) await sleep(1e9)
        const secret = await token?.()
        if (secret === null) return close(4401, "no token")
        const loaded = positions.has("") ? "" : await load()
        if (loaded) positions.set("", loaded)
        if (isHidden || isOver) continue // in the meantime
        if (loaded !== undefined) outcome = await (isHttp ? overHttp : overWebSocket)(secret, (tried = 1))
      } catch (error) {
        tell("error", error)
      }
      lose()
      const [code, reason, wait] = outcome
      if (openedAt && Date.now() - openedAt > STEADY) attempts = refusals = 0
      // Two that don't open: HTTP says whether the server is there at all. After HTTP a WebSocket has one chance.
      unopened = plain ? 0 : isHttp ? (openedAt ? 1 : code === 4401 ? 2 : 0) : openedAt ? 0 : unopened + tried
      const known = code > 4000 && code < 4016 ? code - 3000 : code // of servers that take no registered codes
      if (!COMES_BACK.includes(known) && !(code === 4401 && token && refusals++ < 3)) return close(code, reason)
      if (unopened > 1 && !isHttp) continue
      const longest = Math.min(waits.max, waits.min * 2 ** attempts++) * 1000
      await sleep(wait ?? Math.random() * longest + (known === 1013 && STEADY))
    }
  }
  function awake({ type }) {
    if (type.startsWith("page")) isHidden = type === "pagehide"
    if (isHidden) return end?.(1006) // else the browser couldn't keep the page to go back to
    if (document.visibilityState === "hidden") return
    if (!link) wake()
    else link.probe ? link.probe() : end?.(1006, "", 0)
  }
  for (const type of WAKES) addEventListener(type, awake, true)
  lose()
  run()
  return {
    get status() { return status },
    on(type, handler) {
      const some = (handlers[type] ??= new Set()).add(handler)
      return () => some.delete(handler)
    },
    publish: async (data, { channel, key } = {}) => plain && link
      ? link.send(data) : ask({ type: "publish", data, channel, idempotency_key: key, client: key && client }),
    call: (name, args) => ask({ type: "call", name, args }),
    subscribe: (channel, { since } = {}) => new Promise((resolve, reject) => {
      if (since) positions.set(channel, since)
      const refuse = (error) => error.code !== "lost" && reject(error, wanted.delete(channel)) // else it is asked again
      const again = () => ask({ type: "subscribe", channel, since: positions.get(channel) ?? "" }).catch(refuse)
      wanted.set(channel, { again, resolve, refuse })
      link?.probe ? again() : link && end(1006, "", 0) // HTTP is told of it when it is opened
    }),
    unsubscribe: (channel) => (wanted.delete(channel), positions.delete(channel), ask({ type: "unsubscribe", channel })),
    close: () => close(),
  }
}
