"""What stands in xenstore for a domain and its devices.

``declare.py``  the nodes a domain gets when it is made, those of its device model, what to remove (pure)
``console.py``  finding a domain's console
"""
