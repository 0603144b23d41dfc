// Reads a document: by the official JSON Schema, by AsyncAPI's own parser, and, if asked to, by the generator of models,
// which finds no end of a dictionary of itself.
import { readFileSync } from "node:fs"
import { createRequire } from "node:module"
import { Parser } from "@asyncapi/parser"
import { TypeScriptGenerator } from "@asyncapi/modelina"
import Ajv from "ajv"

const text = readFileSync(process.argv[2], "utf8")
const schema = createRequire(import.meta.url)("@asyncapi/specs/schemas/3.0.0.json")
delete schema.definitions["http://json-schema.org/draft-07/schema"] // which ajv knows
const validate = new Ajv({ strict: false, allErrors: true, logger: false }).compile(schema)
validate(JSON.parse(text))

const { document, diagnostics } = await new Parser().parse(text)
const models = document && process.argv[3] === "models" ? await new TypeScriptGenerator().generate(document) : []
const ids = (found) => found.all().map((each) => each.id())
console.log(JSON.stringify({
  errors: validate.errors ?? [],
  diagnostics: diagnostics.map(({ code, message, path, severity }) => ({ code, message, path, severity })),
  version: document?.version(),
  operations: document && document.operations().all().map((operation) => ({
    id: operation.id(),
    action: operation.action(),
    channel: operation.channels().all()[0].id(),
    address: operation.channels().all()[0].address(),
    messages: ids(operation.messages()),
    reply: operation.reply() ? ids(operation.reply().messages()) : null,
  })),
  channels: document && ids(document.channels()),
  models: models.map(({ modelName }) => modelName),
}))
