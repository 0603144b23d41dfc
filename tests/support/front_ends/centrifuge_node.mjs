// Clients of centrifuge-js in Node, JSON and Protobuf.
import { createInterface } from "node:readline"
import { Centrifuge as Json } from "centrifuge"
import { Centrifuge as Protobuf } from "centrifuge/build/protobuf"
import { WebSocket } from "ws"
import { actions } from "./centrifuge.mjs"

const all = actions({ Json, Protobuf, WebSocket })

for await (const line of createInterface({ input: process.stdin })) {
  const { do: what, tab, ...options } = JSON.parse(line)
  console.log(JSON.stringify((await all[what](tab, options)) ?? null))
}
