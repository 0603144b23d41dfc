// Checks a document by the JSON Schema of OpenAPI 3.1, and that what it refers to is there.
import { readFileSync } from "node:fs"
import { Validator } from "@seriousme/openapi-schema-validator"

const validator = new Validator()
const { valid, errors } = await validator.validate(JSON.parse(readFileSync(process.argv[2], "utf8")))
console.log(JSON.stringify({ valid, errors: errors ?? [], version: validator.version }))
