// AG-UI's own client: one agent for each tab.
import { createInterface } from "node:readline"
import { HttpAgent } from "@ag-ui/client"

const tabs = {}
const actions = {
  open: (tab, options) => { tabs[tab] = { agent: new HttpAgent(options), state: "idle", error: null, custom: [], ends: [] } },
  run: (tab, { runId }) => {
    const it = tabs[tab]
    it.state = "running"
    const subscriber = {
      onCustomEvent: ({ event }) => { it.custom.push(event.value) },
      onRunFinishedEvent: ({ event }) => { it.ends.push(event.outcome?.type ?? null) },
      onRunErrorEvent: ({ event }) => { it.error = event.message },
    }
    it.agent.runAgent({ runId }, subscriber).then(() => { it.state = "done" }, (error) => {
      it.state = "failed"
      it.error ??= error.message
    })
  },
  abort: (tab) => { tabs[tab].agent.abortRun() },
  look: (tab) => {
    const { agent, ...told } = tabs[tab]
    return { messages: agent.messages, ...told }
  },
}

for await (const line of createInterface({ input: process.stdin })) {
  const { do: what, tab, ...options } = JSON.parse(line)
  console.log(JSON.stringify((await actions[what](tab, options)) ?? null))
}
