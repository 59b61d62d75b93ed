"""The control path: who may speak, where backups live, and how Nova learns of a promotion.

    arbiter    the only writer of a pair's state: core.pair's moves by compare-and-set
    hosts      what the agents report; which engines are over
    pairing    a backup's place is made, filled and removed
    catchup    Nova follows a promotion, step by step
    judge      PURE: what is to be done for a server, given all that is known
    reconcile  the effects of the judgement, for every server
    manager    the RPC methods, and the pairs' slow work
    cloud      what we need of OpenStack (nova_cloud is the real one)
"""
