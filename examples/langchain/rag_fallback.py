"""Retrieval-augmented answers that fall back on quoting the sources where the model is unsure of its own words.

pip install langchain-gnuq
python examples/langchain/rag_fallback.py "Is food taken back?" "When is delivery free?"
"""

from __future__ import annotations

import re
import zlib
from typing import Any

from arguments import chat_model, parser, policy
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_gnuq import ChatGnuq, UncertainAnswer, route_by_uncertainty

from gnuq_serve import Policy

CORPUS = {
    "hours": "The shop is open from 9 to 18 on weekdays and from 10 to 14 on Saturday. It is closed on Sunday.",
    "returns": "Unused goods can be returned within 30 days with the receipt. Food is not taken back.",
    "delivery": "Delivery costs 4 euros and is free from 50 euros on. Parcels leave on the next working day.",
    "warranty": "Electric bicycles have a warranty of 3 years, batteries of 2 years.",
}
QUESTIONS = ["What are the opening hours on weekdays?", "Is food taken back?", "When is delivery free?"]
PROMPT = ChatPromptTemplate.from_messages(
    [("system", "Answer the question in one short sentence from this text: {context}"), ("human", "{question}")]
)


class WordHashes(Embeddings):
    """Counts of hashed words: no model to load, the same numbers on every machine."""

    def embed_query(self, text: str) -> list[float]:
        """The counts of one text."""
        counts = [0.0] * 512
        for word in re.findall(r"[a-z0-9]{3,}", text.lower()):
            counts[zlib.crc32(word.rstrip("s").encode()) % len(counts)] += 1
        return counts

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """The counts of each text."""
        return [self.embed_query(text) for text in texts]


def quote(held: UncertainAnswer) -> AIMessage:
    """The sources themselves in place of an uncertain answer."""
    document: Document = held.input["documents"][0]
    return AIMessage(
        f"I am not sure ({held.decision.reason}). Our page '{document.id}' says: {document.page_content}"
    )


def build(model: ChatGnuq, policy: Policy) -> Runnable[str, str]:
    """The chain: question in, answer or quotation out."""
    store = InMemoryVectorStore(WordHashes())
    store.add_documents([Document(text, id=name) for name, text in CORPUS.items()])

    def found(given: dict[str, Any]) -> list[Document]:
        return store.similarity_search(given["question"], k=1)

    return (
        {"question": RunnablePassthrough()}
        | RunnablePassthrough.assign(documents=found)
        | RunnablePassthrough.assign(context=lambda given: given["documents"][0].page_content)
        | route_by_uncertainty(PROMPT | model, abstain=quote, policy=policy)
        | StrOutputParser()
    )


def main() -> None:
    """Answer the questions."""
    arguments = parser(__doc__.splitlines()[0], answer_at=0.62)
    arguments.add_argument("questions", nargs="*", default=QUESTIONS)
    args = arguments.parse_args()
    chain = build(chat_model(args.base_url, args.api_key, args.model), policy(args))
    for question in args.questions:
        print(f"Q: {question}\nA: {chain.invoke(question)}\n")


if __name__ == "__main__":
    main()
