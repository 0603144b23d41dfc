// The Vercel AI SDK as `useChat` uses it, without React: one chat for each tab.
import { createInterface } from "node:readline"
import { AbstractChat, DefaultChatTransport } from "ai"

class State {
  status = "ready"
  error = undefined
  messages
  constructor(messages) { this.messages = messages }
  pushMessage = (message) => { this.messages = [...this.messages, message] }
  popMessage = () => { this.messages = this.messages.slice(0, -1) }
  replaceMessage = (index, message) => {
    this.messages = this.messages.map((each, at) => (at === index ? structuredClone(message) : each))
  }
  snapshot = (value) => structuredClone(value)
}

class Chat extends AbstractChat {
  constructor({ id, api, headers, messages = [] }) {
    const told = { finished: null, errors: [] }
    super({
      id,
      state: new State(messages),
      transport: new DefaultChatTransport({ api, headers }),
      onFinish: ({ isAbort, isDisconnect, isError }) => { told.finished = { isAbort, isDisconnect, isError } },
      onError: (error) => told.errors.push(error.message),
    })
    this.told = told
  }
}

const tabs = {}
const actions = {
  open: (tab, options) => { tabs[tab] = new Chat(options) },
  send: (tab, { text }) => { tabs[tab].sendMessage({ text }) },
  resume: (tab) => { tabs[tab].resumeStream() },
  stop: (tab) => tabs[tab].stop(),
  look: (tab) => {
    const { status, error, messages, told } = tabs[tab]
    return { status, error: error?.message ?? null, messages, ...told }
  },
}

for await (const line of createInterface({ input: process.stdin })) {
  const { do: what, tab, ...options } = JSON.parse(line)
  console.log(JSON.stringify((await actions[what](tab, options)) ?? null))
}
