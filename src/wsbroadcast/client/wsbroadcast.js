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
const failure = (event) => Object.assign(Error(event.text), event) // with its code
const split = (position = "") => position.split(":") // into epoch and offset
const lost = () => failure({ code: "lost", text: "no connection" })

export function connect(url, { token, state, plain, tokenProtocol = "bearer" } = {}) {
  const address = new URL(url, location.href), handlers = {}
  const pending = new Map() // commands that wait for their answer, by id
  const positions = new Map() // where this client is, by channel; "" is the channel of the path
  const wanted = new Map(), rolls = new Map() // further channels, with who waits for the answer; who is in a channel
  const client = `wsbroadcast.v1:${Math.random()}` // names the keys of its publishes, over all connections
  const waits = { min: 0.5, max: 20, ping: 0 } // between attempts and pings (s); the server may say otherwise
  let status = "connecting", isOver, isHidden // for good; by `pagehide`
  let link, openedAt // what is open now; since when, or 0
  let end, wake = () => {} // ends this attempt: end(code, reason, wait); ends the wait for the next one
  let pathChannel, count = 0, silence, grace // from the first `subscribed`; of commands; timers: all is silent, tell the page
  let isHeldBack, patience = STEADY // SSE, by a proxy; how long HTTP does until a WebSocket is tried again
  let taken = Promise.resolve() // messages are taken one after the other, and wait while `state` loads
  const tell = (type, ...what) => handlers[type]?.forEach((handler) => handler(...what))
  const sleep = (ms) => new Promise((done) => setTimeout((wake = done), ms))
  const keyOf = ({ channel, to }) => (to ? `\n${to}` : channel === pathChannel ? "" : channel ?? "")
  function become(next, detail) {
    grace = clearTimeout(grace)
    if (next !== status) tell("status", (status = next), detail)
  }
  function opened(next) {
    link = next
    openedAt = Date.now()
    become("open")
    if (link.probe) wanted.forEach(enter), rolls.forEach(watch)
  }
  const begin = (command) => (link?.probe ? link.send(command) : link && end(1006, "", 0)) // HTTP says it when it is opened
  const enter = (_, channel) => begin({ type: "subscribe", channel, since: positions.get(channel), id: channel })
  const watch = (_, channel) => begin({ type: "presence", channel })
  function lose() { // what was asked for is not answered any more; the page is told, unless it is back soon
    link = end = clearTimeout(silence)
    pending.forEach(({ reject }) => reject(lost()))
    pending.clear()
    if (!isOver) grace ??= setTimeout(become, GRACE, "lost")
  }
  function close(code = 1000, reason = "") {
    if (isOver) return
    isOver = true
    end?.(code)
    lose()
    WAKES.forEach((type) => removeEventListener(type, awake, true))
    become("closed", { code, reason })
    wake()
  }
  function alive(ms = waits.ping && waits.ping * 1000 + SLACK) { // something came: the next may take a ping and some slack
    clearTimeout(silence)
    if (ms) silence = setTimeout(() => end?.(1006), ms)
  }
  function receive(event) { // answers are given at once, the rest in turn
    const { type, id } = event, waiting = pending.get(id) ?? wanted.get(id)
    pending.delete(id)
    if (waiting && type === "error") return waiting.reject(failure(event), wanted.delete(id))
    waiting?.resolve(type === "result" ? event.data : event)
    if (waiting && type !== "subscribed") return
    if (type === "hello") Object.assign(waits, event.reconnect).ping = event.ping
    if (type === "expiring" && token) (async () => ask({ type: "refresh", token: await token() }))().catch(() => {})
    taken = taken.then(() => take(event)).catch((error) => tell("error", error))
  }
  async function take(event) {
    const { type, channel, position, recovered } = event
    if (type === "subscribed" && event.id === undefined) pathChannel ??= channel
    const key = keyOf(event), before = positions.get(key)
    const [epoch, offset] = split(position), [epochBefore, offsetBefore] = split(before)
    if (type === "message" && epoch && epoch === epochBefore && +offset <= +offsetBefore) return // a repeat
    const isMissed = recovered === false || type === "gap", loaded = isMissed ? await load(channel) : ""
    if (loaded === undefined) return end?.(1006) // the next connection asks from the same place
    if (loaded || (position && (isMissed || !before || type !== "subscribed"))) positions.set(key, loaded || position)
    if (event.encoding) event.data = Uint8Array.from(atob(event.data), (byte) => byte.charCodeAt(0))
    if (event.code === "unavailable") setTimeout(() => rolls.forEach(watch), STEADY) // the broker was away
    if (type === "presence") rolls.forEach((roll, name) => keyOf({ channel: name }) === (isHeldBack ? "" : key) && write(roll, event))
    tell(type, event)
  }
  function write(roll, { channel, previous, version, count, members, joined = members, left }) {
    if (previous > roll.version) return watch(roll, channel) // what came between was dropped, as this client was slow
    if (!left) roll.clear()
    left?.forEach((user) => roll.delete(user))
    joined?.forEach((member) => roll.set(member.id ?? member.user, member))
    Object.assign(roll, { version, count })
  }
  // The page loads what it shows. It resolves with where that was, or an empty text; with nothing if it failed.
  const load = (channel) => (async () => state?.(channel))()
    .then((position) => (typeof position === "string" ? position : ""), (error) => tell("error", error))
  const ask = (command) => new Promise((resolve, reject) => {
    if (!link) return reject(lost())
    if (plain) return reject(failure({ code: "not_supported", text: "plain connection" }))
    link.send({ ...command, id: ++count })
    pending.set(count, { resolve, reject })
  })
  function target(wait) { // of a long poll, and of a stream, for which it means nothing
    const found = new URL(address), add = (name, value) => found.searchParams.append(name, value)
    positions.forEach((position, key) => key < " " && add("since" + key.replace("\n", "_"), position)) // no further channel
    if (wait >= 0) {
      add("events", 1), add("wait", wait)
      wanted.forEach((_, name) => add("channel", positions.has(name) ? `${name}@${positions.get(name)}` : name))
      rolls.forEach((_, name) => add("presence", name))
    }
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
    socket.onmessage = ({ data }) => receive(plain ? { type: "message", data } : JSON.parse(data), alive())
    alive(OPEN_TIMEOUT)
  })
  const overHttp = (secret) => new Promise((done) => {
    let over = new AbortController(), retry
    const finish = (end = (...outcome) => done(outcome, over.abort(), clearTimeout(retry)))
    const request = async (accept, wait, body) => {
      const headers = { accept, ...(secret && { authorization: `Bearer ${secret}` }), ...(body && { "content-type": accept }) }
      const options = { method: body && "POST", body, headers, cache: "no-store", signal: over.signal }
      const response = await fetch(body ? address : target(wait), options)
      if (response.ok || body) return response
      const { code, reason } = await response.json().catch(() => ({})) // as a close frame says it
      throw finish(code ?? { 401: 4401, 403: 4403 }[response.status] ?? 1006, reason)
    }
    const send = ({ id, ...command }) => request("application/json", 0, JSON.stringify(command))
      .then(async (response) => receive({ ...(await response.json()), id }))
      .catch(() => pending.get(id)?.reject(lost()))
    async function stream() {
      const timer = setTimeout(() => over.signal.aborted || over.abort((isHeldBack = true)), FIRST_BYTE_TIMEOUT)
      const { body } = await request("text/event-stream", 0), reader = body.pipeThrough(new TextDecoderStream()).getReader()
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
        const { position, recovered, messages } = await (await request("application/json", wait)).json()
        if (!link) opened({ send })
        if (recovered === false) receive({ type: "subscribed", position, recovered })
        messages.forEach(receive)
        receive({ type: "position", position })
        await taken // the next asks from there
      }
    }
    const knock = () => (retry = setTimeout(() => { // in a while: a server that restarted may let WebSockets through again
      const probe = newSocket(secret, new URL(address))
      probe.onopen = () => probe.close() || pending.size || finish(1006, "", 0)
      knock((patience = Math.min(patience * 2, 600_000)))
    }, patience))
    knock()
    ;(isHeldBack ? poll() : stream().catch(() => isHeldBack && poll())).catch(() => {}).then(() => finish(1006))
  })
  async function run() {
    let attempts = 0, refusals = 0, unopened = 0 // WebSockets in a row
    while (!isOver) {
      const isHttp = unopened > 1
      let outcome = [1006], tried = (openedAt = 0)
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
  WAKES.forEach((type) => addEventListener(type, awake, true))
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
      if (plain) return ask().catch(reject)
      if (since) positions.set(channel, since)
      enter(wanted.set(channel, { resolve, reject }), channel)
    }),
    unsubscribe: (channel) =>
      ask({ type: "unsubscribe", channel }, [wanted, positions, rolls].forEach((some) => some.delete(channel))),
    members(channel) {
      const key = keyOf({ channel }), roll = rolls.get(key) ?? new Map()
      if (!plain && !rolls.has(key)) watch(rolls.set(key, roll), key)
      return roll
    },
    close: () => close(),
  }
}
