"""The endpoint that OpenAI clients speak to, and the streams behind it, which outlive the replicas they come from.

`openai` is the API as types, `refusals` its errors, `service` what is done with a request, `streams` how tokens go on
when a replica is lost, `rings` what a replica is to the gateway, `web` the HTTP face.
"""
