// Checks values by a schema; prints, for each that doesn't fit, its number and why.
import { readFileSync } from "node:fs"
import Ajv from "ajv"

const { schema, values } = JSON.parse(readFileSync(process.argv[2], "utf8"))
const validate = new Ajv({ strict: false }).compile(schema)
const wrong = values.flatMap((value, number) => (validate(value) ? [] : [[number, validate.errors]]))
console.log(JSON.stringify(wrong))
