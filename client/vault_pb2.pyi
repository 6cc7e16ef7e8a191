from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("format", "model", "pending")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    format: int
    model: str
    pending: int
    def __init__(self, format: _Optional[int] = ..., model: _Optional[str] = ..., pending: _Optional[int] = ...) -> None: ...

class SubjectsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SubjectsReply(_message.Message):
    __slots__ = ("subjects",)
    SUBJECTS_FIELD_NUMBER: _ClassVar[int]
    subjects: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, subjects: _Optional[_Iterable[str]] = ...) -> None: ...

class TrainRequest(_message.Message):
    __slots__ = ("format", "spec", "round", "subjects", "vector", "clip_scale")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SUBJECTS_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    CLIP_SCALE_FIELD_NUMBER: _ClassVar[int]
    format: int
    spec: str
    round: int
    subjects: _containers.RepeatedScalarFieldContainer[str]
    vector: bytes
    clip_scale: float
    def __init__(self, format: _Optional[int] = ..., spec: _Optional[str] = ..., round: _Optional[int] = ..., subjects: _Optional[_Iterable[str]] = ..., vector: _Optional[bytes] = ..., clip_scale: _Optional[float] = ...) -> None: ...

class TrainReply(_message.Message):
    __slots__ = ("ticket", "refusal")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    ticket: str
    refusal: str
    def __init__(self, ticket: _Optional[str] = ..., refusal: _Optional[str] = ...) -> None: ...

class CollectRequest(_message.Message):
    __slots__ = ("ticket", "wait_seconds")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ticket: str
    wait_seconds: float
    def __init__(self, ticket: _Optional[str] = ..., wait_seconds: _Optional[float] = ...) -> None: ...

class CollectReply(_message.Message):
    __slots__ = ("release", "refusal", "pending", "keys")
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    release: Release
    refusal: str
    pending: bool
    keys: bytes
    def __init__(self, release: _Optional[_Union[Release, _Mapping]] = ..., refusal: _Optional[str] = ..., pending: _Optional[bool] = ..., keys: _Optional[bytes] = ...) -> None: ...

class SumRequest(_message.Message):
    __slots__ = ("format", "run", "round", "leg", "subject", "message")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    LEG_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    format: int
    run: str
    round: int
    leg: int
    subject: str
    message: bytes
    def __init__(self, format: _Optional[int] = ..., run: _Optional[str] = ..., round: _Optional[int] = ..., leg: _Optional[int] = ..., subject: _Optional[str] = ..., message: _Optional[bytes] = ...) -> None: ...

class SumReply(_message.Message):
    __slots__ = ("answer", "refusal")
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    answer: bytes
    refusal: str
    def __init__(self, answer: _Optional[bytes] = ..., refusal: _Optional[str] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("total", "dtype", "users", "receipt")
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    USERS_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    total: bytes
    dtype: str
    users: int
    receipt: str
    def __init__(self, total: _Optional[bytes] = ..., dtype: _Optional[str] = ..., users: _Optional[int] = ..., receipt: _Optional[str] = ...) -> None: ...
