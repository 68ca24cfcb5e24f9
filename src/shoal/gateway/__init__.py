"""The endpoint that OpenAI clients speak to, and the streams behind it, which outlive the replicas they come from.

`openai` is the API as types, `refusals` its errors, `service` what is done with a request, `streams` how tokens go on
when a replica is lost, `rings` what a replica is to the gateway, `keys` who may ask and how much, `receipts` what nodes
did by their own signed word, `web` the HTTP face.
"""
